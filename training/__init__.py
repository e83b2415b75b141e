"""Training scripts, started by `accelerate launch training/train_<method>.py`."""
