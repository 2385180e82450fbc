"""Topologies that move: which weights survive changes in training, how many never does.

Every so many steps some survivors of each layer go and as many others come: an exchange of indices.
So shapes, optimizer states and partitions stay what they are. One file for each way to choose what
goes (set.py, rigl.py, mest.py); growth.py chooses what comes, moving.py does it in a training.
"""
