"""The stage of jobs/digits.yaml and the script that trained its model."""
