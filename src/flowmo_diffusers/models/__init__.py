"""The networks: functions of tensors that know nothing of pipelines, training or files."""
