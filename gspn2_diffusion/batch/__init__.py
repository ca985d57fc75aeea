"""Many pictures from a list of prompts. Nothing here imports torch before something is drawn."""
