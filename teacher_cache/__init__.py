"""Types, record codecs, shards, storage, cache folders, and the forward pass of the teacher."""
