"""The parts of doctor.py: facts of a machine are read here and judged there, and nothing does both.

readings, gpu_readings, trials -> Machine -> the checks -> findings -> page
"""
