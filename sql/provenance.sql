-- Which mechanisms paid for what every run released, at which ε and δ, and from which versions was it made?
-- One row per mechanism and output, for all runs of the release root. Outputs without a row here follow from these
-- alone: `SELECT * FROM outputs` and `SELECT * FROM inputs` say how.
SELECT
  run,
  stage,
  output,
  output_version,
  mechanism,
  noise_multiplier,
  round(sampling_probability, 6) AS sampling_probability,
  steps,
  round(epsilon, 4) AS epsilon,
  delta,
  corpus,
  corpus_version,
  model
FROM releases
ORDER BY run, released, stage, output;
