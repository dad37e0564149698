"""The parts of `train_gpt.py`: the model, the text, the checkpoints."""
