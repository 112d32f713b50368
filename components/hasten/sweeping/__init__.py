"""Sweeps over recipes: many command lines over one store, declared or searched, and their summary."""
