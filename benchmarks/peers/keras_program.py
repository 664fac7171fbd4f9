"""Keras 3 on JAX, its fastest backend here, with MLflow's own callback; it validates once an epoch, as model.fit does."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import time

import common
import keras
import mlflow


class Stop(keras.callbacks.Callback):
    """Ends the training after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left == 0:
            self.model.stop_training = True


def main() -> None:
    given = common.arguments()
    (images, labels), validation = common.arrays(train=True), common.arrays(train=False)
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(300, activation="relu"),
            keras.layers.Dense(100, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(common.LR, momentum=common.MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    per_epoch = -(-len(images) // common.BATCH)
    with mlflow.start_run():
        every = (
            {"log_every_epoch": True}
            if given.log_every >= per_epoch
            else {"log_every_epoch": False, "log_every_n_steps": given.log_every}
        )
        began = time.perf_counter()
        if given.steps < per_epoch:
            images, labels = (
                images[: given.steps * common.BATCH],
                labels[: given.steps * common.BATCH],
            )
        history = model.fit(
            images, labels, batch_size=common.BATCH, epochs=-(-given.steps // per_epoch), validation_data=validation, verbose=0,
            callbacks=[mlflow.keras.MlflowCallback(**every), Stop(given.steps)],
        )  # fmt: skip
        common.finish(began, given.steps, history.history["val_accuracy"][-1])
        mlflow.keras.log_model(
            model, name="model", pip_requirements=[f"keras=={keras.__version__}"]
        )


if __name__ == "__main__":
    main()
