#!/bin/sh
exec /shared/venv/bin/python -m gentrain.cli train /shared/runs/edm/submission/config.yaml
