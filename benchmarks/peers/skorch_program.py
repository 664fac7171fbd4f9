"""skorch with its MLflow logger on every batch; it validates once an epoch, as its fit does."""

import time

import common
import mlflow
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import EpochScoring, MlflowLogger
from skorch.dataset import Dataset
from skorch.helper import predefined_split
from torch import nn


def main() -> None:
    given = common.arguments()
    (images, labels), validation = common.arrays(train=True), common.arrays(train=False)
    per_epoch = -(-len(images) // common.BATCH)
    if given.steps < per_epoch:
        images, labels = images[: given.steps * common.BATCH], labels[: given.steps * common.BATCH]
    with mlflow.start_run() as run:
        net = NeuralNetClassifier(
            common.network(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=common.LR, optimizer__momentum=common.MOMENTUM,
            batch_size=common.BATCH, iterator_train__shuffle=True, max_epochs=max(1, given.steps // per_epoch), verbose=0,
            train_split=predefined_split(Dataset(*validation)),
            callbacks=[MlflowLogger(run, log_on_batch_end=given.log_every == 1), EpochScoring("accuracy", name="train_acc", on_train=True)],
        )  # fmt: skip
        began = time.perf_counter()
        net.fit(images, labels)
        common.finish(
            began, min(given.steps, per_epoch * net.max_epochs), float(net.history[-1, "valid_acc"])
        )
        common.log_model(net.module_)


if __name__ == "__main__":
    main()
