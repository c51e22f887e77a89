"""The model registry: TUF metadata signed by people, kept fresh by online keys, and the blobs it names."""
