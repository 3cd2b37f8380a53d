#!/usr/bin/env bash
# Runs a program for Windows with its arguments, without a terminal, which this wine would draw on.
exec wine "$@" </dev/null
