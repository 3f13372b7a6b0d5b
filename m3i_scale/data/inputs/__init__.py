"""Other formats as input of `shards make`, read front to back in bounded memory."""
