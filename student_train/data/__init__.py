"""The resumable stream, and where each sample's tokens are."""
