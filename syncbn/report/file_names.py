"""Names of the files and directories of a run, which are part of its format.

The code that writes them (the trainer, its tasks) and the code that reads them (the report, a run that goes on) both
import them from here.
"""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
CLASSES = "classes.json"
AUDIT = "audit.json"
LAYERS = "layers.json"
MISTAKES = "mistakes.json"
NONFINITE = "nonfinite.jsonl"  # the samples of steps whose loss or gradient was not finite
SUMMARY = "summary.json"
REPORT = "report.html"
LOCK = "run.lock"
MULTIRUN = "multirun.yaml"  # of Hydra, in the directory of a multirun

# Of tasks other than training.
CHECK = "check.json"
PARITY = "parity.json"
PREDICTIONS = "predictions.csv"
RECALIBRATED = "recalibrated.pt"

# Directories.
HYDRA = ".hydra"
CHECKPOINTS = "checkpoints"
BEST = "best.pt"  # in CHECKPOINTS
EXPORT = "export"
MASKS = "masks"
PROFILE = "profile"
OPERATORS = "operators.txt"  # in PROFILE
TENSORBOARD = "tensorboard"
WANDB = "wandb"
