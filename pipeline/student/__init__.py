"""Trains a student, lets it answer, and scores the answers."""
