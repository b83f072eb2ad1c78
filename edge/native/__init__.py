"""Compiled passes of the INT8 network, where the installation found a C++ compiler."""
