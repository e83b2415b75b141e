"""The one training loop, and what surrounds an optimizer step: checkpoints, averages, signals,
previews, reports.
"""
