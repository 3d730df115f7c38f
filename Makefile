.PHONY: test lint lines tables figures

test:            ## the whole suite, under three minutes on two cores
	pytest -q

lint:
	ruff check .

tables:          ## rewrites the tables of README.md from results/*.jsonl
	python results/tables.py

figures:         ## every picture of README.md and docs, from the code; trains the digits first if they are not there
	python docs/figures.py

lines:           ## the reading path is a promise: under 1,200 lines together
	@wc -l pyramid.py schedule.py model.py train.py sample.py
