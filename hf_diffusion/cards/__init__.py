"""The model card of a run: what is known about it, laid out by model_cards/template.md."""
