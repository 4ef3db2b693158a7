"""The stages of jobs/rain_soon.yaml and the script that trained their model."""
