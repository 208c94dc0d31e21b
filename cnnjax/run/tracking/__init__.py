"""Experiment trackers that follow a run: Weights & Biases and MLflow.

Training writes its record to the run's directory and knows no tracker. For each that is asked for
the trainer starts a process (`followers`) that reads the directory as it grows and sends what is
new (`follower`): so nothing that a tracker does, or fails to do, can change or stop training. What
has been sent is noted (`sent`), and a resumed run goes on in the same tracked run.
"""

TRACKERS = ("wandb", "mlflow")
DIRECTORY = "tracking"
