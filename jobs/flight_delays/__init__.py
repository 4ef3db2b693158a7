"""The stages of jobs/flight_delays.yaml and the script that trained their model."""
