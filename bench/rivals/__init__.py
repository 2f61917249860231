"""The simplest rivals of mode robust: layers, pixels, hashes, mixtures, re-ranking, all from the same passes."""
