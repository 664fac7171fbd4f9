"""PyTorch Lightning with its MLflow logger, as its documentation has it: a LightningModule, a DataLoader, self.log on each step."""

import logging
import time
import warnings

import common
import lightning
import mlflow
import torch
from lightning.pytorch.loggers import MLFlowLogger
from torch.nn import functional
from torch.utils.data import DataLoader


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = common.network()

    def training_step(self, batch, index):  # type: ignore[no-untyped-def]
        images, labels = batch
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels)
        self.log("train/loss", loss)
        self.log("train/accuracy", (logits.argmax(1) == labels).float().mean())
        return loss

    def validation_step(self, batch, index):  # type: ignore[no-untyped-def]
        images, labels = batch
        logits = self.network(images)
        self.log("val/loss", functional.cross_entropy(logits, labels))
        self.log("val/accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        return torch.optim.SGD(self.parameters(), lr=common.LR, momentum=common.MOMENTUM)


def main() -> None:
    given = common.arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train = DataLoader(common.fashion_mnist(train=True), batch_size=common.BATCH, shuffle=True)
    validation = DataLoader(common.fashion_mnist(train=False), batch_size=common.BATCH)
    logger = MLFlowLogger(experiment_name="peers", tracking_uri=given.store)
    trainer = lightning.Trainer(
        max_steps=given.steps, val_check_interval=common.EVAL_EVERY, check_val_every_n_epoch=None, log_every_n_steps=given.log_every,
        logger=logger, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    model, began = Classifier(), time.perf_counter()
    trainer.fit(model, train, validation)
    common.finish(
        began, trainer.global_step, float(trainer.callback_metrics.get("val/accuracy", 0.0))
    )
    with mlflow.start_run(run_id=logger.run_id):
        common.log_model(model.network)


if __name__ == "__main__":
    main()
