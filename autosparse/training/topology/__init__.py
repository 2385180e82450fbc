"""Which weights survive while a network trains (`training.topology`); base.py is the static case.

moving.py exchanges some survivors of each layer for as many other weights, every so many steps.
Only indices change: shapes, optimizer states and partitions stay as they are. set.py, rigl.py and
mest.py choose the survivors that go, growth.py the weights that take their place. gradual.py prunes
a dense network in training, by the schedules of gmp.py and ac_dc.py.
"""
