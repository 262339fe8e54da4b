-- job
go_on_when_full()
local lease = redis.call('HGET', job_key(ARGV[2]), 'watch_s')
if lease then redis.call('ZADD', WATCH, 'XX', NOW + lease, ARGV[2]) end
return 0
