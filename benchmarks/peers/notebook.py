"""The notebook's loop: torchvision's transform per image, DataLoader, scikit-learn's accuracy and .item() each step."""

import time

import common
import mlflow
import numpy as np
import torch
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import DataLoader


@torch.no_grad()
def evaluating(
    model: nn.Module, loader: DataLoader, loss_function: nn.Module
) -> tuple[float, float]:
    losses, predicted, true = [], [], []
    for images, labels in loader:
        logits = model(images)
        losses.append(loss_function(logits, labels).item())
        predicted.extend(logits.argmax(axis=-1).numpy().tolist())
        true.extend(labels.numpy().tolist())
    return float(np.mean(losses)), float(accuracy_score(true, predicted))


def main() -> None:
    given = common.arguments()
    train = DataLoader(common.fashion_mnist(train=True), batch_size=common.BATCH, shuffle=True)
    validation = DataLoader(common.fashion_mnist(train=False), batch_size=common.BATCH)
    model, loss_function, step = common.network(), nn.CrossEntropyLoss(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=common.LR, momentum=common.MOMENTUM)
    record: list[tuple[float, float]] = []
    began, accuracy = time.perf_counter(), 0.0
    if not given.no_logging:
        mlflow.start_run()
    while step < given.steps:
        for images, labels in train:
            if step == given.steps:
                break
            if step % common.EVAL_EVERY == 0:
                model.eval()
                loss, accuracy = evaluating(model, validation, loss_function)
                model.train()
                if not given.no_logging:
                    mlflow.log_metric("val/loss", loss, step=step)
                    mlflow.log_metric("val/accuracy", accuracy, step=step)
            optimizer.zero_grad()
            logits = model(images)
            batch_loss = loss_function(logits, labels)
            batch_loss.backward()
            optimizer.step()
            record.append(
                (
                    batch_loss.item(),
                    float(accuracy_score(labels.numpy(), logits.argmax(axis=-1).numpy())),
                )
            )
            step += 1
            if not given.no_logging:
                mlflow.log_metric("train/loss", record[-1][0], step=step)
                mlflow.log_metric("train/accuracy", record[-1][1], step=step)
    loss, accuracy = evaluating(model, validation, loss_function)
    common.finish(began, step, accuracy)
    if given.no_logging:
        torch.save(model.state_dict(), "model.pt")
    else:
        common.log_model(model)
        mlflow.end_run()


if __name__ == "__main__":
    main()
