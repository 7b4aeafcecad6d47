"""`opcd export`: a trained student as a folder, merged, as a GGUF file, or on the hub, compared with its source."""
