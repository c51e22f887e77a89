"""The signing ceremony, offline: keys, the signers' workspace, packing, review. Imports nothing of the server."""
