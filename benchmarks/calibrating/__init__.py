"""What benchmarks/calibration.py is made of: the clock, a measurement, and what it says of larger sizes."""
