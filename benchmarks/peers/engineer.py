"""A good engineer's loop: data as one tensor, permutation slices, autograd, fused SGD, metrics as tensors, log_batch each 1,000 steps."""

import time

import common
import mlflow
import torch
from mlflow.entities import Metric
from torch.nn import functional


def main() -> None:
    given = common.arguments()
    torch.set_num_threads(1)
    images, labels = map(torch.from_numpy, common.arrays(train=True))
    test_images, test_labels = map(torch.from_numpy, common.arrays(train=False))
    model = common.network()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=common.LR, momentum=common.MOMENTUM, fused=True
    )
    client, run = mlflow.MlflowClient(), mlflow.start_run()
    losses, accuracies, step = [], [], 0
    began, accuracy = time.perf_counter(), 0.0

    def log(values: dict[str, list[float]], steps: range) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, s)
            for key, series in values.items()
            for s, value in zip(steps, series, strict=True)
        ]
        for start in range(0, len(metrics), 1_000):
            client.log_batch(run.info.run_id, metrics=metrics[start : start + 1_000])

    def report() -> float:
        with torch.no_grad():
            logits = model(test_images)
        found = (logits.argmax(1) == test_labels).float().mean().item()
        log(
            {
                "val/loss": [functional.cross_entropy(logits, test_labels).item()],
                "val/accuracy": [found],
            },
            range(step, step + 1),
        )
        if losses:
            every = slice(given.log_every - 1, None, given.log_every)
            steps = range(step - len(losses) + 1, step + 1)[every]
            log(
                {
                    "train/loss": torch.stack(losses).tolist()[every],
                    "train/accuracy": torch.stack(accuracies).tolist()[every],
                },
                steps,
            )
            losses.clear()
            accuracies.clear()
        return found

    while step < given.steps:
        for rows in torch.randperm(len(images)).split(common.BATCH):
            if step == given.steps:
                break
            if step % common.EVAL_EVERY == 0:
                accuracy = report()
            x, y = images[rows], labels[rows]
            logits = model(x)
            loss = functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            accuracies.append((logits.detach().argmax(1) == y).float().mean())
            step += 1
    accuracy = report()
    common.finish(began, step, accuracy)
    common.log_model(model)
    mlflow.end_run()


if __name__ == "__main__":
    main()
