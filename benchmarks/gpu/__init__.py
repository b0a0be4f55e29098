"""What only a GPU can show, as one script for a machine without a network: `make gpu`."""
