"""The laboratory: objectives compared over seeds and data, with planted truth to hold them against."""
