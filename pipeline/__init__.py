"""Stages as plain functions, sample sources, recipes and reports. No Ray."""
