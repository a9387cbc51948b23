-- Which mechanisms paid for what every run released, at which ε and δ, and from which versions was it made?
-- One row per output and mechanism that it follows from, also by way of other outputs and runs: texts follow from the
-- adapter that they were sampled from, the selection from texts and votes. Where an output has several rows, it costs
-- at most the sum of their ε at the sum of their δ. An output without a row follows from nothing private.
WITH RECURSIVE made AS (
  -- Vectors of the corpus lie in the private zone, under a path that public ones have in this; those of the baseline
  -- are only compared with, in the private zone.
  SELECT DISTINCT outputs.path AS output, inputs.location AS source
  FROM outputs
  JOIN inputs ON inputs.run = outputs.run AND inputs.stage = outputs.stage
  WHERE inputs.name NOT IN ('corpus-embeddings', 'baseline-embeddings')
),
sources AS (
  SELECT DISTINCT path AS output, path AS source
  FROM outputs
  UNION
  SELECT sources.output, made.source
  FROM sources
  JOIN made ON made.output = sources.source
),
latest AS (
  SELECT path AS output, max(version) AS version
  FROM outputs
  GROUP BY path
)
SELECT DISTINCT
  sources.output,
  latest.version AS output_version,
  releases.run,
  releases.stage,
  mechanism,
  noise_multiplier,
  round(sampling_probability, 6) AS sampling_probability,
  steps,
  round(epsilon, 4) AS epsilon,
  delta,
  corpus,
  corpus_version,
  model
FROM sources
JOIN releases ON releases.output = sources.source
JOIN latest ON latest.output = sources.output
ORDER BY sources.output, releases.run, releases.stage;
