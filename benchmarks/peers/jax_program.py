"""A jitted JAX program: lax.scan over the batches of each 1,000 steps, every step's loss and accuracy returned, then log_batch."""

import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import mlflow
import numpy as np
from common import BATCH, LR, MOMENTUM
from jax import lax
from mlflow.entities import Metric

WIDTHS, SEGMENT = (784, 300, 100, 10), common.EVAL_EVERY


def initial(seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    bounds = [inputs**-0.5 for inputs in WIDTHS[:-1]]
    parameters = [
        (
            jax.random.uniform(key, (i, o), minval=-bound, maxval=bound),
            jax.random.uniform(key, (o,), minval=-bound, maxval=bound),
        )
        for key, i, o, bound in zip(keys, WIDTHS[:-1], WIDTHS[1:], bounds, strict=True)
    ]
    return parameters, jax.tree.map(jnp.zeros_like, parameters)


def loss_and_accuracy(parameters: Any, x: Any, labels: Any) -> tuple[Any, Any]:
    for weight, bias in parameters[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = parameters[-1]
    logits = x @ weight + bias
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()
    return loss, (logits.argmax(1) == labels).mean()


def segment(state: Any, rows: Any, images: Any, labels: Any) -> Any:
    """Some steps of SGD with momentum on the batches `rows` [S, B]: the new state, and their losses and accuracies."""

    def step(state: Any, batch: Any) -> Any:
        parameters, velocities = state
        measured, gradients = jax.value_and_grad(loss_and_accuracy, has_aux=True)(
            parameters, images[batch], labels[batch]
        )
        velocities = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocities, gradients)
        return (jax.tree.map(lambda p, v: p - LR * v, parameters, velocities), velocities), measured

    return lax.scan(step, state, rows)


def trainer(split: Any) -> Callable[[int], None]:
    """Trains so many steps, 500 in a program, on a split of this package's data; nothing but the steps."""
    images, labels = jnp.asarray(split.images.numpy()), jnp.asarray(split.labels.numpy())
    program, generator = jax.jit(segment, donate_argnums=0), np.random.default_rng(0)
    state = initial(0)

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(0, steps, 500):
            rows = jnp.asarray(
                generator.permutation(len(labels))[: 500 * BATCH].reshape(500, BATCH)
            )
            state, (loss, _) = program(state, rows, images, labels)
        loss.block_until_ready()

    return train


def main() -> None:
    given = common.arguments()
    images, labels = map(jnp.asarray, common.arrays(train=True))
    test = tuple(map(jnp.asarray, common.arrays(train=False)))
    program, evaluate = jax.jit(segment, donate_argnums=0), jax.jit(loss_and_accuracy)
    client, run = mlflow.MlflowClient(), mlflow.start_run()
    generator, state = np.random.default_rng(0), initial(0)
    began = time.perf_counter()

    def log(first: int, series: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, float(v), now, first + s)
            for key, values in series.items()
            for s, v in enumerate(np.atleast_1d(values))
        ]
        for start in range(0, len(metrics), 1_000):
            client.log_batch(run.info.run_id, metrics=metrics[start : start + 1_000])

    epochs = -(-given.steps * BATCH // len(labels))
    order = np.concatenate([generator.permutation(len(labels)) for _ in range(epochs)])[
        : given.steps * BATCH
    ].reshape(-1, BATCH)
    loss, accuracy = evaluate(state[0], *test)
    log(0, {"val/loss": loss, "val/accuracy": accuracy})
    for start in range(0, given.steps, SEGMENT):
        rows = order[start : start + SEGMENT]
        state, (losses, accuracies) = program(state, jnp.asarray(rows), images, labels)
        log(start + 1, {"train/loss": losses, "train/accuracy": accuracies})
        loss, accuracy = evaluate(state[0], *test)
        log(start + len(rows), {"val/loss": loss, "val/accuracy": accuracy})
    common.finish(began, given.steps, float(accuracy))
    np.savez("model.npz", *jax.tree.leaves(state[0]))
    mlflow.log_artifact("model.npz", "model")
    mlflow.end_run()


if __name__ == "__main__":
    main()
