"""Runs any task: training, evaluation, prediction, checkpoints and the folder a run leaves.

What predicts (`task`, `weights`, `evaluate`) imports neither Lightning nor torchmetrics; `fit` and `module` do.
"""
