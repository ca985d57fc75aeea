"""Losses, data and run helpers for the training scripts; nothing else imports this package."""
