"""This machine: files, processes, network, versions, and other libraries' noise."""
