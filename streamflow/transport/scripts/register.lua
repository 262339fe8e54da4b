-- worker, lease_s, what it says of itself as JSON
go_on_when_full()
redis.call('HSET', WORKERS, ARGV[2], seconds(NOW + ARGV[3]) .. ' ' .. ARGV[4])
return 0
