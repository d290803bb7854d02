"""Sources by name: the digits, and the data sets that torchvision reads."""
