-- Does every synthesis shard supply the selection alike?
-- Shards differ in their seeds alone, so a rate that stands out points at a shard that went wrong.
-- For runs that voted on their own `synthetic`; of another table (vote --candidates) no shard supplied anything.
SELECT
  shard,
  count(*) AS instructions,
  count(selected.id) AS selected,
  round(CAST(count(selected.id) AS DOUBLE) / count(*), 4) AS selection_rate,
  round(avg(tokens), 1) AS mean_tokens
FROM synthetic
LEFT JOIN selected ON selected.id = synthetic.id
GROUP BY shard
ORDER BY shard;
