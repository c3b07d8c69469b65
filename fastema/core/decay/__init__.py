"""The decay of each update: schedules, and their values on the host and on the device."""
