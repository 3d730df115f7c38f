.PHONY: test lint lines tables page

test:            ## the whole suite, under three minutes on two cores
	pytest -q

lint:
	ruff check .

tables:          ## rewrites the tables of README.md from results/*.jsonl
	python results/tables.py

page:            ## docs/index.html from README.md and the sources
	python docs/page.py

lines:           ## the reading path is a promise: under 1,200 lines together
	@wc -l pyramid.py schedule.py model.py train.py sample.py
