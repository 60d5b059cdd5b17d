"""What the path through Forebay is compared with: each the same HTTP and the same simulated engine, less the queue.

These files run in environments of their own (see `../prepare.py`) and import nothing but what is there.
"""
