"""What a stage of a recipe does, a verb a file: artifacts in, one artifact out."""
