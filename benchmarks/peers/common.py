"""What the peers share: their arguments, the data where torchvision looks for it, and the line that they end with."""

import argparse
import json
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import torch
from torch import nn
from torchvision import datasets
from torchvision.transforms import ToTensor

DATA = Path(__file__).resolve().parents[2] / "data"
BATCH, LR, MOMENTUM, EVAL_EVERY = 32, 0.001, 0.9, 1_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True, help="MLflow tracking URI")
    parser.add_argument("--steps", type=int, default=37_500)
    parser.add_argument("--log-every", type=int, default=1)
    parser.add_argument("--no-logging", action="store_true", help="the same loop without MLflow")
    given = parser.parse_args()
    mlflow.set_tracking_uri(given.store)
    mlflow.set_experiment("peers")
    return given


def fashion_mnist(train: bool) -> datasets.FashionMNIST:
    """torchvision's data set of images as tensors."""
    return datasets.FashionMNIST(DATA, train=train, transform=ToTensor())


def arrays(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 784] float32 in 0..1 and labels [N] int64."""
    dataset = fashion_mnist(train)
    return dataset.data.numpy().reshape(-1, 784).astype(np.float32) / 255, dataset.targets.numpy()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def log_model(model: nn.Module) -> None:
    example = np.zeros((1, 1, 28, 28), np.float32)
    mlflow.pytorch.log_model(model, name="model", input_example=example, pip_requirements=["torch"])


def finish(began: float, steps: int, accuracy: float) -> None:
    """Say what the training alone took, its evaluations and logging included, and how good its model is."""
    json.dump(
        {
            "training_s": time.perf_counter() - began,
            "steps": steps,
            "accuracy": accuracy,
            "torch": torch.__version__,
        },
        sys.stdout,
    )
