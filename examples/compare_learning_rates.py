"""Learning rates compared from Python: run the cells (`# %%`) in an editor or Jupyter, or the file as a script.

    .venv/bin/python examples/compare_learning_rates.py

Runs that are recorded already are not trained again. From nothing it trains ten runs, some five minutes on one core.
"""

# %% What would be trained: a spec, checked and complete
from fmnist import api

reference = api.load("holdout")
print(
    f"{reference.spec.steps:,} steps of {reference.spec.optimizer!r}, validated on {reference.spec.validation_images:,} images"
)

# %% Five seeds of two settings; each run is in MLflow when this returns
for name in ("holdout", "holdout-lr-0.01"):
    outcomes = api.run(name, seeds=range(5))
    print(f"{name}: {len(outcomes)} trained, {5 - len(outcomes)} there before")

# %% Every run is a row: parameters are p/..., last values of metrics m/..., tags t/...
runs = api.runs()
print(
    runs[runs["t/experiment"] == "holdout"][["name", "t/seed", "m/last/val_accuracy"]].to_string(
        index=False
    )
)

# %% The verdict, with its uncertainty over new seeds and new images
compared = api.compare("holdout", "holdout-lr-0.01")
print(compared)

# %% The same as values
[comparison] = compared.comparisons
print(
    f"{comparison.verdict}: {comparison.difference:+.4f} ({comparison.low:+.4f} to {comparison.high:+.4f}), n = {comparison.n}"
)
