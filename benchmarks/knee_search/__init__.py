"""The parts of benchmarks/knee.py: what is varied, what processes of their own measure, and what follows from it.

axes -> settings -> processes that measure (worker) -> points -> prediction, choice -> knee.json -> page, pictures
"""
