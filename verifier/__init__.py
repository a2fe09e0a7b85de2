"""Judging streams. The judging core is pure: tensors in, verdicts out."""
