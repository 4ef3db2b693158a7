"""The blocks of a job file as frozen pydantic models; `job` puts them together."""
